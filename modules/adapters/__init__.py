"""What an adapter is, where it goes, what it begins with, and what it becomes."""
