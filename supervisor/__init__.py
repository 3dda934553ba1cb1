"""Who runs: the command line, the settings, the supervisord configuration, its event listener and the control tool."""
