"""A page that shows timelines in a browser: a template with its own style and script, and the module that fills it in."""
