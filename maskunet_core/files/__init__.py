"""What is written and read: generators and recorded masks as safetensors."""
