"""What a run is, as dataclasses whose fields are the flags of a command."""
