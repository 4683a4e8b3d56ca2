"""Reading all tables of an image: which clusters are used, what is damaged, and recovery after a crash."""
