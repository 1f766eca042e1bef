"""RunPod: endpoints over REST v2, and the files of its Hub."""
