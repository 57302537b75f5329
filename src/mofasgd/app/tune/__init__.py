"""Fine-tuning of Hugging Face models: `mofasgd finetune`, `mofasgd glue` and `mofasgd profile`."""
