#!/bin/sh
# Koyeb: deploy/templates/koyeb.sh, with Koyeb's command-line tool logged in and a secret named trimaran-api-keys there.
# Verified: the image under this port, these variables and this check, locally.  Not verified: with Koyeb.
exec koyeb services create trimaran --app trimaran --docker docker.io/example/trimaran:gpu \
  --instance-type gpu-nvidia-l4 --regions fra --min-scale 0 --max-scale 1 \
  --ports 8000:http --routes /:8000 --checks 8000:http:/health --checks-grace-period 8000=60 \
  --env PORT=8000 --env SERVE_MODEL=Qwen/Qwen3-0.6B --env SERVE_API_KEYS=@trimaran-api-keys
