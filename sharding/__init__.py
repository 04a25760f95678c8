"""Where bytes live: FSDP2 of quantized modules (fsdp) and who sends which rows to whom (routes). Never hears of formats."""
