#include "check.h"
void test_resample2d() {}
