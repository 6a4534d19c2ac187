"""Other libraries' ways to the factors of K-FAC, each behind the same small face."""
