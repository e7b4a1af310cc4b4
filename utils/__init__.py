"""What is about the course, not about language models: one subject a file."""
