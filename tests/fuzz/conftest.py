"""No doctests here, and nothing to import twice: the layers register themselves."""

collect_ignore_glob = ["*"]
