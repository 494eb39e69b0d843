"""How people's files are read: packed or not, in which encoding, as which kind of file."""
