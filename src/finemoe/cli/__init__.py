"""Floor 7: the command line, one file a verb. Heavy imports happen inside the verbs: --help is quick."""
