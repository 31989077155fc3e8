"""`aropd diagnose`: its request (spec), the scoring (score), and its JSON (summary)."""
