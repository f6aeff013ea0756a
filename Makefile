# The README's commands. Everything is done by scripts and CMake; this file only puts them in order.
#
#   make demo   set-up, build of the program, then fine-tune, merge, compress, evaluate and bench on real images
#   make test   set-up, build, then the test suite
PREFIX ?= /usr/local

.PHONY: all setup configure build test demo install check-format lint clean
.DEFAULT_GOAL := build
all: build

setup:
	@bash core/cmake/setup.sh

configure: setup
	@cmake --preset release --log-level=STATUS

build: configure
	cmake --build build

test: build
	ctest --test-dir build --output-on-failure -j2

demo: configure
	cmake --build build --target pyractl
	recipes/demo.sh

install: build
	cmake --install build --prefix $(PREFIX)

check-format:
	@core/cmake/check_format.sh

lint: configure
	python3 core/cmake/lint.py

clean:
	rm -rf build build-dev build-asan
