# The coordinator's port, and the parts that every TLS or Beast file of the house shares.
add_library(sc_tls STATIC ${CMAKE_SOURCE_DIR}/config/tls_openssl.cpp)
target_link_libraries(sc_tls PUBLIC sc_config PRIVATE OpenSSL::SSL OpenSSL::Crypto)

# Beast's body, compiled once. Only three .cpp files see Beast: this room's gateway, worker's control
# client and tools' HTTP client (one such file takes 10-20 s).
add_library(sc_beast STATIC beast_library.cpp)
target_compile_definitions(sc_beast PUBLIC BOOST_BEAST_SEPARATE_COMPILATION)
target_link_libraries(sc_beast PUBLIC sc_asio Boost::headers PRIVATE house_sanitizers)

add_library(sc_gateway STATIC gateway_beast.cpp gateway_rules.cpp)
target_link_libraries(sc_gateway
  PUBLIC sc_config sc_tls
  PRIVATE sc_log sc_beast nlohmann_json::nlohmann_json OpenSSL::SSL OpenSSL::Crypto Threads::Threads)
