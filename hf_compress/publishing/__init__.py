"""Reports, cards and folders whose every number was measured."""
