"""`conserve doctor`: what a report needs, and what is wrong here."""
