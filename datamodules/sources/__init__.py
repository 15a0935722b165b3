"""Sources and streams of examples, in the formats in use."""
