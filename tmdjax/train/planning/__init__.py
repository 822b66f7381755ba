"""What a step costs on devices that need not be there."""
