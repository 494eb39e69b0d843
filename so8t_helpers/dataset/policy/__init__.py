"""What may enter training: licences, robots.txt, unsafe content."""
