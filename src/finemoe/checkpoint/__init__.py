"""Floor 2: runs, Hugging Face folders and GGUF files, in and out; seven rooms, each uses those before it."""
