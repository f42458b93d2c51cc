"""What each study says: its claims, its tables and its picture. Nothing here imports Keras."""
