"""02_train: LoRA, SO8T gates and PET on a frozen 8-bit base."""
