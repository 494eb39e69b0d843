"""What a Phi3 checkpoint is: config.json, tensor names, rope, weights on the disk, the chat dialect."""
