"""`aropd diagnose`: what is requested (spec), the scoring, and the summary that becomes its JSON."""
