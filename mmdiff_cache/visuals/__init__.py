"""Arrays as pictures: colours that mean the same everywhere, and sheets of captioned tiles."""
