"""World models whose memory is a map that moves with the world and with the agent."""
