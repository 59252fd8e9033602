#include "check.h"
void test_bias_leaky_relu() {}
