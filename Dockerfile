# Trains and predicts without a network once it is built. Not tried yet: no Docker daemon was at hand.
#
#   docker build -t competition .
#   docker run --gpus all --shm-size 8g -v /data/Wildfire:/app/Wildfire -v /data/runs:/app/runs competition \
#       train_seg.py --epochs 150 --bs 64
#   docker run --gpus all --shm-size 8g -v /data/Wildfire:/app/Wildfire -v /data/runs:/app/runs competition \
#       predict.py --task seg --tta
#
# The commands are those of a run's notebook (python -m utils.notebook); published weights are mounted as files.
FROM python:3.12
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
ENTRYPOINT ["python"]
CMD ["train_seg.py", "--help"]
