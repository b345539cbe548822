// Which sources the extension was built from: setup.py compiles this file anew at every build and passes their hash.
#ifndef EROLLOUT_SOURCES
#define EROLLOUT_SOURCES ""
#endif

extern "C" const char* erollout_sources() { return EROLLOUT_SOURCES; }
