def drawing(diff): return ""
