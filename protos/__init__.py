"""The wire contract: transfuse.proto, and what protoc made of it (`make protos`, committed)."""
