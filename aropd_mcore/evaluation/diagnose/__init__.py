"""`aropd diagnose`: its validated request (spec), the scoring (score) and the JSON (summary)."""
