"""Models in processes of their own: which are resident where, and how they are spoken to."""
