"""A page that shows timelines in a browser: a template with its style and script, and the module that fills it in."""
