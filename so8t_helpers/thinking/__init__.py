"""What is private: how thinking is written, found again, withheld and recorded."""
