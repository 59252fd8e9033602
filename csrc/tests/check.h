// A test is a function that calls CHECK; main.cpp runs them all and counts the failures.
#pragma once

#include <cstdio>

inline int failures = 0;

#define CHECK(condition)                                                        \
    do {                                                                        \
        if (!(condition)) {                                                     \
            ++failures;                                                         \
            std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
        }                                                                       \
    } while (false)

void test_activation();
void test_dtypes();
void test_glu();
void test_group_norm_silu();
void test_ops();
void test_reversible();
void test_bias_leaky_relu();
void test_resample2d();
