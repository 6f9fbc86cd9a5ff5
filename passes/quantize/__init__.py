"""Weight and activation quantization."""
