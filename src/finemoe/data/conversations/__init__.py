"""From the records that people have to conversations, preference pairs and prompts."""
