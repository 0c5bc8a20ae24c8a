"""Pictures of a start: what is in them, and how they are drawn as SVG, as a page, and as text."""
