"""Where bytes live: FSDP2 of quantized modules (fsdp), who sends which rows to whom (routes). Knows no formats."""
