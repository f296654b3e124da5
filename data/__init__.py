"""What flows: schemas, the artifact store, recipes, readers, templates, the built-in data set."""
