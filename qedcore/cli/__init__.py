"""The `qed` command."""
