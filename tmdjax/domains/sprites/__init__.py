"""Videos of moving sprites: scenes, prompts, and the check of a video against one."""
