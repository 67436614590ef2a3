"""What a child process does for the diagnosis: one module for each question, each a program of its own."""
