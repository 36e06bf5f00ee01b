"""Page of targeted relevance and LRP."""
