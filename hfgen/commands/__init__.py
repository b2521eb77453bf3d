"""What the commands of ``hfgen`` do: each module has ``run(options) -> str``, the text that the command prints."""
