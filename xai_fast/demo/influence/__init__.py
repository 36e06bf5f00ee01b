"""Page of influence functions."""
