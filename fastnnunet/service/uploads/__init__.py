"""What clients send: counted, put down under names of our own, and refused unopened where it is no image."""
