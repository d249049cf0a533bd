"""Files and batches on the app: routes, uploads, metrics, and their life inside it."""
