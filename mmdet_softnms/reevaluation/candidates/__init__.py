"""Raw candidates of a test set: from a config to a store on disk."""
