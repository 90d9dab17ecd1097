# make demo     from nothing to pictures: environment, sample data, a short training, predictions
# make test     from nothing to a passing test run
# make campaign faults at random, until CAMPAIGN_MINUTES are over (20), and a table of what was tried and passed
# make bench    speed, as ratios of two things measured in one run
VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: demo announce-demo test test-slow campaign bench clean

$(VENV)/installed: requirements.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: announce-demo $(VENV)/installed
	test -d Wildfire || $(PYTHON) -m data.samples --only wildfire --train 64 --size 128
	$(PYTHON) train_seg.py --imgsz 128 --epochs 18 --bs 4 --repeat 1 --schedule cosine --gain 1 --name demo
	$(PYTHON) predict.py --task seg --tta --polygons

announce-demo:
	@echo "After the installation, the demo takes about 4 minutes on 2 processor cores, and less on newer ones."

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/installed-dev
	$(PYTHON) -m pytest -m slow

campaign: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 CAMPAIGN_MINUTES=$${CAMPAIGN_MINUTES:-20} $(PYTHON) -m tests.campaign

bench: $(VENV)/installed-dev
	for file in tests/bench/*_speed.py tests/bench/*_loader.py; do $(PYTHON) -m tests.bench.$$(basename $$file .py) || exit; done

clean:
	rm -rf $(VENV) runs
